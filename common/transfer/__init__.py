"""What lesson 8 stands on.

origins       where the weights come from
images        which images are used; features in their place
flags         the lesson's command line
prediction    what a trained model says of picture files
export        a trained model as files that run without the course
embedding     features as points in the plane
"""
