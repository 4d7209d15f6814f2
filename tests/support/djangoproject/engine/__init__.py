"""An engine like PostGIS's: a class over Django's, with things of its own."""
