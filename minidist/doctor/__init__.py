"""Reads what ranks have recorded, minidist's or torch's, and says who waited where for whom."""
