"""Task vectors in, one tensor out: pure functions in the papers' verbs."""
