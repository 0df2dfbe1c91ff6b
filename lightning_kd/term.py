"""A term: where a loss is applied, and how much it weighs."""
