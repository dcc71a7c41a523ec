"""Where data lies, and the system calls that make it durable."""
