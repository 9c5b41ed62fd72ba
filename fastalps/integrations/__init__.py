"""Fastalps inside other frameworks; none of them is imported with the package."""
