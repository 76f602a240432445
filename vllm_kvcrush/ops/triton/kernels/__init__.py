"""What runs on the device; the modules above, of the same names, launch it."""
