"""Chaos, seeded and bounded: everything that can go wrong at once, and then nothing must be lost."""
