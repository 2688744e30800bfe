"""A folder of its own: ms-swift puts that of a plugin first on sys.path, where `trl.py` would hide TRL."""
