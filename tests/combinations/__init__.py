"""Whole services, built as our pages say, under chaos; judged by the servers that they use."""
