"""The library's version, written into every checkpoint's origin rows."""

__version__ = "0.1.0"
