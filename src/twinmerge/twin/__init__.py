"""The artifact: shared expert, exclusive knowledge and router, from recipe to folder; knows no model library."""
