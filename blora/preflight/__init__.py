"""What blora_preflight.py is made of: a training is checked, rehearsed and planned."""
