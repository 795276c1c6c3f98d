"""Judges of images: which of several candidates an image shows. One file per kind of judge."""
