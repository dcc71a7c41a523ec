"""Dataset locations, and durable I/O on local files and object stores."""
