"""DCP's storage plug-ins: `ArrowStorageWriter` and `ArrowStorageReader`, carried by `dcp.save` and `dcp.load`."""
