"""Measures what the plugin costs: compaction's share of a request's time, and the steps of a server
where no request is compressed."""
