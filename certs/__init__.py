"""Certificates and keys: parsing, checking, issuing."""
