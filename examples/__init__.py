"""Programs that drive the command lines as a user would, by subprocess: nothing here is imported by the libraries."""
