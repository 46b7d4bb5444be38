"""Fuzz targets for everything that is decoded from somebody else's bytes. Not installed; see docs/fuzzing.md."""
