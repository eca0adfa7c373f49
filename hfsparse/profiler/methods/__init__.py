"""Methods: from measurements to a plan, one file each."""
