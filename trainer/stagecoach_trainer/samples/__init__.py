"""Samples: text and conversations as token ids, packed into rows, mixed, and dealt out to optimiser steps."""
