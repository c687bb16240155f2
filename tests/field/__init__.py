"""What breaks runs in the field, as public reports tell it: see cases.py."""
