"""Back ends of the store. Use them through `stagecoach_api.store`."""
