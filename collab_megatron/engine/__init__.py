"""SGLang: a server's command line, and the clients that sample from it and control it. The servers are unmodified."""
