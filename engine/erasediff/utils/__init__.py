"""Progress bars and timers."""
