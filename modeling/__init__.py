"""The files of a draft's Hub repository; imported as `hf_longspec.modeling`, never as `modeling`."""
