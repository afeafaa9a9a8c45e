"""What attention costs on this machine: the engines beside their rivals, in one run, with the machine's own limits."""
