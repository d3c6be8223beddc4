"""The vision suite: image tasks, their experts, and what is measured of them."""
