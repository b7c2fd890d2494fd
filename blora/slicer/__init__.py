"""What blora_slicer.py is made of: a LoRA is planned, read, changed and written."""
