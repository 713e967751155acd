/* Empty on purpose: bcc brings a linux/bpf.h of its own. */
