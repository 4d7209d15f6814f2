"""Other projects' own tests, run against what stands in for their classes here."""
