"""One file per router; the folder is the registry. `moe.config.load.resolve_router` finds them by file name."""
