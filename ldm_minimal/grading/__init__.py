"""Marks for submitted notebooks: `python -m ldm_minimal grade`. Read grade.py first."""
