"""From raw logs to a prepared data set: Ali-CCP's text, and any table of impressions."""
