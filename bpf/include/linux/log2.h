/* Empty on purpose: bcc includes it, networking programs need nothing of it. */
