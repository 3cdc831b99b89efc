"""From a trained run to a bundle that runs on a device."""
