"""Generated from the models: the CRD, the JSON schema for editors, the field reference."""
