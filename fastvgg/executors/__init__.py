"""Where the chunks of a run are computed: threads of this process, or workers of a cluster."""
