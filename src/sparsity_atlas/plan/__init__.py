"""Target `plan`: what a configuration will cost, before anything runs. Start with `cost`."""
