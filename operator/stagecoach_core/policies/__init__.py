"""One policy, one file: small rules that `decide` puts together."""
