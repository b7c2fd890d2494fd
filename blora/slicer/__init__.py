"""The slicer: a slice is planned, read, changed and written."""
