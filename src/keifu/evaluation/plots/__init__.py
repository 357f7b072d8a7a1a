"""Pictures for people: attention maps, decision boundaries, pages."""
