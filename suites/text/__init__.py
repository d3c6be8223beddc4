"""The text suite: eight MiniLM experts and three unseen tasks."""
