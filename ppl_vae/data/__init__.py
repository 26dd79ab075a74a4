"""Tables, images, texts, their transforms, and tables read in blocks of rows."""
