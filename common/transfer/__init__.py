"""What lesson 8 stands on.

task          what a run starts from and is to learn
origins       where the weights come from
images        which images are used, other domains; features in the place of images
parts         a model in parts
arms          trainings of the experiments that are no plain ones
flags         the lesson's command line
prediction    what a trained model says of picture files
calibration   how sure it is, and when it should say that it isn't
deployment    a trained model put to use, also as files that run without the course
embedding     features as points in the plane
"""
