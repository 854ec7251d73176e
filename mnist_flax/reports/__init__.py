"""What a run leaves for its reader: results, pictures, digits in photographs, exported files."""
