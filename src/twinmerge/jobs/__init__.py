"""What a user asks for: build, grow, merge, predict, export, plan."""
