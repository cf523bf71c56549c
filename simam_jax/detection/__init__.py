"""Detection: results that people and programs can read."""
