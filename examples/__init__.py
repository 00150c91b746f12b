"""Programs that run the commands in subprocesses, as a user would. The libraries import nothing from here."""
