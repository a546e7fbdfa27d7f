"""From objects to tables: pure functions of the store's rows. Nothing here touches the kernel."""
