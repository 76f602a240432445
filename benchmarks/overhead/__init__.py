"""What the plugin costs: compaction's share of a request, and the steps of a server where no
request is compressed."""
