"""The real policy replayed on a trace, on a virtual clock: real placement, store, scheduler and engine step."""
