"""The behaviour of sharedpool with real processes, real sockets and a back end that counts."""
