"""Samples: records as token ids, in shards, rows and groups, planned as optimiser steps. Imports all lower rooms."""
